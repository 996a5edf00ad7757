"""One file for each exercise; `refimpl.learn.exercise` says what it holds."""
