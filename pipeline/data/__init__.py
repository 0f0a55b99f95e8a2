"""Data sets of text and images, and the token windows and pixel values made from them."""
