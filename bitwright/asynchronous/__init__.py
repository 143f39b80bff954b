"""The client for event loops, and the source from which `bitwright.blocking` is made by `make client`."""
