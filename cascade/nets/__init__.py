"""The networks: what they are as data, their layers, and how they are launched."""
