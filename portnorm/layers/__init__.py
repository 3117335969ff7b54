"""Objects that hold parameters: sugar over the pure functions below them."""
