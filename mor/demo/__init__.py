"""`mor demo`: small models on text, where depth does not pay yet, and on a task where it does."""
