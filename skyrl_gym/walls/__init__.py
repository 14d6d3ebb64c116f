"""The walls around programs that a model writes, and around other processes that need one of their own."""
