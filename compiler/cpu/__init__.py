"""CPU code: kernel IR to LLVM IR to object code, vector math, the thread pool."""
