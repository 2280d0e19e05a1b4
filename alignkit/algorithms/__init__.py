"""One file a method; its name is registered by importing it."""
