"""What is known of jobs as repositories of a Hub."""
