"""Where pictures and captions come from, and how they reach the device."""
