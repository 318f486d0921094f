"""What differs between families of encoders. Every stage may import this package."""
