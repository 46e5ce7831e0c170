"""Complete examples of custom modules and data, written as a user of this package would; none of them is built in."""
