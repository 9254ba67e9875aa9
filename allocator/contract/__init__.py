"""What every part agrees on: schemas, tensor layout, byte arithmetic, digests. Imports only pydantic.

The one exception is `allocator.contract.packing`, which turns codes into the layout and back and needs
torch; nothing here imports it.
"""
