"""Programs compiled for machines that are not there, and what can be read off them."""
