"""Text to SQL: explore a database with queries, then submit one."""
