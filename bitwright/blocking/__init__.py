"""The client for blocking programs. All but `waits` is made from `bitwright.asynchronous`: change it there."""
