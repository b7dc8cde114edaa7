"""What the operators share: tables of work, shapes for each GPU, arithmetic, registration."""
