"""What an encoded image says of its pixels, read right or refused by name, within bounds."""
