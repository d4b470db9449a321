"""What is left of a fleet of LoRAs when it is stored in fewer bytes; see README.md."""
