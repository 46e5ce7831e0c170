"""Parameters and processes of distributed runs."""
