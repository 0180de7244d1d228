"""Without a GPU Triton's kernels run in its interpreter, which is chosen when triton is first imported."""

import os

if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")
