"""What every wrapper of kernels/ptx/ gives for known inputs, on a GPU and in the emulator.

    python -m tests.conformance OUT_DIR      # records on a GPU, from the project's folder

`cases.ALL` lists the cases. Each is one small kernel; its inputs and what a GPU gave for them are
kept in `tests/fixtures/`, and `test_emulator_fixtures.py` gives the same inputs to the emulator.
"""
