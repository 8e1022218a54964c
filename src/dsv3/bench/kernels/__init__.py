"""What `dsv3 bench ops` measures, one file a family of operations."""
