"""Complete examples of custom modules and data, written as a user of this package would; nothing of it is built in."""
