"""Writing OUT: where bytes go (`writer`), how they move (`copying`, `spread`, `in_place`), what is done (`journal`)."""
