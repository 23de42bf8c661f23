"""transformers' layers one at a time, their experts apart; and what is measured on the way."""
