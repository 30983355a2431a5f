"""What batch size, split how, with which learning rate: answered by measurement."""
