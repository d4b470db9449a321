"""Families of related tasks: how many related adapters make a basis worth it, and how related? See README.md."""
