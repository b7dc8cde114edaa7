"""What a layer and a step cost before they run: bytes, memory and time, from plan and rates."""
