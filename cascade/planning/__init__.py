"""What a chain does and holds, counted on the meta device, and how it is made to fit."""
