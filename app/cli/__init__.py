"""The `bitwright` command. One file a group of commands; everything about jobs goes through `bitwright`."""
