"""Care of the store itself: backup, restore, and the blobs that nothing refers to."""
