"""The `bitwright` command. One file per group of commands; everything about jobs goes through `bitwright`."""
