"""Findings rendered for people: the words are made once (``verdict``), then laid out for a terminal or a page. Never imports torch."""
