"""What a run would cost, said before it starts: ``python main.py plan``, the command in ``trainer``."""
