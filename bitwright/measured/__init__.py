"""Parts of a report that say how near a result is: noise of figures, kinds of text, tasks."""
