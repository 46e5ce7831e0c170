"""A chain on a real language model: GSM8K and Zig."""
