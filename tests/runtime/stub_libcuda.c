/* A CUDA driver without a GPU, for tests of how cuda.bindings is called.

   It has the functions that runtime/cuda/calls.py uses, with the signatures and the structures of
   cuda.h. A launch runs at once, by the function given to stub_runner. A wrong handle, size or
   state is an error code, as with the real one. What was launched is written, a line each, to the
   file that STUB_CUDA_LOG names. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int CUresult;
typedef int CUdevice;
typedef uint64_t CUdeviceptr;
enum { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_HANDLE = 400, NOT_FOUND = 500 };
#define API __attribute__((visibility("default"))) CUresult

enum { CONTEXT = 0x11, STREAM, EVENT, LIBRARY, KERNEL, GRAPH, NODE, EXEC };
typedef struct { int kind; int alive; } Handle;
typedef struct Library Library;
typedef struct { Handle h; Library *home; char name[128]; int count, size[64]; } Kernel;
typedef struct {
  Kernel *func;
  unsigned grid[3], block[3], shared;
  void **params, **extra;
  void *kern, *ctx;
} Params; /* CUDA_KERNEL_NODE_PARAMS_v2 */
typedef struct Node {
  Handle h;
  Params p;
  uint64_t values[64 * 16];
  unsigned cluster[3], together;
  int deps;
  struct Node *next;
} Node;
typedef struct { Handle h; Node *first, *last; } Graph;
typedef struct { Handle h; Graph *graph; } Exec;
struct Library { Handle h; char *text; Kernel kernels[256]; int count; };
typedef struct Block { uint64_t base, size; struct Block *next; } Block;

/* text of the module, entry, grid, block, cluster, shared bytes, values of the parameters */
typedef int (*Runner)(const char *, const char *, const unsigned *, const unsigned *,
                      const unsigned *, unsigned, const uint64_t *);
static Runner runner;
static Block *blocks;
static Handle context = {CONTEXT, 1};
static __thread Handle *current;
static int64_t held;

static int good(void *handle, int kind) {
  Handle *h = handle;
  if (kind == STREAM && (uintptr_t)h <= 2) return current != NULL; /* the default streams */
  return h && h->kind == kind && h->alive && current;
}
static void *make(size_t size, int kind) {
  Handle *h = calloc(1, size);
  h->kind = kind, h->alive = 1, held++;
  return h;
}
static CUresult drop(void *handle, int kind) {
  if (!good(handle, kind)) return INVALID_HANDLE;
  ((Handle *)handle)->alive = 0, held--; /* kept, so that a second use is seen */
  return OK;
}

API cuInit(unsigned flags) { return getenv("STUB_CUDA_HIDDEN") ? 100 : flags ? INVALID_VALUE : OK; }
API cuDriverGetVersion(int *v) { *v = 13010; return OK; }
API cuDeviceGetCount(int *n) { *n = 1; return OK; }
API cuDeviceGet(CUdevice *d, int n) { *d = n; return n == 0 ? OK : 101; }
API cuDeviceGetName(char *to, int size, CUdevice d) {
  snprintf(to, size, "Stub GPU"); return d == 0 ? OK : 101;
}
API cuDeviceGetAttribute(int *v, int which, CUdevice d) {
  *v = which == 75 ? 9 : 0; /* 75 and 76: compute capability */ return d == 0 ? OK : 101;
}
API cuDeviceTotalMem_v2(size_t *n, CUdevice d) { *n = 1 << 26; return d == 0 ? OK : 101; }
API cuDevicePrimaryCtxRetain(void **c, CUdevice d) { *c = &context; held++; return d == 0 ? OK : 101; }
API cuDevicePrimaryCtxRelease_v2(CUdevice d) { held--; return d == 0 ? OK : 101; }
static __thread int depth;
API cuCtxPushCurrent_v2(void *c) { current = c, depth++; return c == &context ? OK : 201; }
API cuCtxPopCurrent_v2(void **c) {
  *c = current;
  if (--depth < 0) return 201;
  current = depth ? &context : NULL;
  return OK;
}
API cuCtxGetCurrent(void **c) { *c = current; return OK; }
API cuGetErrorName(CUresult e, const char **s) {
  *s = e == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : e == 500 ? "CUDA_ERROR_NOT_FOUND" : "CUDA_ERROR_STUB";
  return OK;
}
API cuGetErrorString(CUresult e, const char **s) { *s = "so says the stub"; (void)e; return OK; }

API cuLibraryLoadData(Library **to, const void *code, void *a, void *b, unsigned n, void *c, void *d,
                      unsigned m) {
  (void)a, (void)b, (void)c, (void)d;
  const char *text = code;
  if (n || m || !text) return INVALID_VALUE;
  if (!memcmp(text, "\177ELF", 4)) text += 4;
  if (!current || !strstr(text, ".version ")) return 218; /* a real cubin, say */
  Library *made = make(sizeof *made, LIBRARY);
  made->text = strdup(text);
  for (char *at = strstr(made->text, ".entry "); at; at = strstr(at + 1, ".entry ")) {
    if (made->count == 256) return 218;
    Kernel *k = &made->kernels[made->count++];
    k->h.kind = KERNEL, k->h.alive = 1, k->home = made;
    if (sscanf(at, ".entry %127[A-Za-z0-9_$]", k->name) != 1) return 218;
    char *end = strchr(at, ')');
    for (char *p = strstr(at, ".param "); p && p < end; p = strstr(p + 1, ".param ")) {
      if (k->count == 64) return 218;
      k->size[k->count++] = strncmp(p, ".param .align 64 .b8", 20) ? 8 : 128;
    }
  }
  *to = made;
  return OK;
}
API cuLibraryUnload(Library *l) {
  for (int i = 0; good(l, LIBRARY) && i < l->count; i++) l->kernels[i].h.alive = 0;
  return drop(l, LIBRARY);
}
API cuLibraryGetKernel(Kernel **to, Library *l, const char *name) {
  if (!good(l, LIBRARY)) return INVALID_HANDLE;
  for (int i = 0; i < l->count; i++)
    if (!strcmp(name, l->kernels[i].name)) return *to = &l->kernels[i], OK;
  return NOT_FOUND;
}
API cuKernelGetFunction(Kernel **to, Kernel *k) { *to = k; return good(k, KERNEL) ? OK : INVALID_HANDLE; }
API cuKernelGetParamInfo(Kernel *k, size_t i, size_t *offset, size_t *size) {
  if (!good(k, KERNEL)) return INVALID_HANDLE;
  if (i >= (size_t)k->count) return INVALID_VALUE;
  *offset = 8 * i;
  if (size) *size = k->size[i];
  return OK;
}
API cuKernelSetAttribute(int which, int value, Kernel *k, CUdevice d) {
  (void)value;
  return good(k, KERNEL) && d == 0 && (which == 8 || which == 14) ? OK : INVALID_VALUE;
}

static CUdeviceptr block_of(size_t n) {
  void *at = NULL;
  if (posix_memalign(&at, 512, n)) return 0;
  memset(at, 0xCB, n);
  Block *block = calloc(1, sizeof *block);
  *block = (Block){(CUdeviceptr)at, n, blocks};
  blocks = block, held++;
  return block->base;
}
static CUresult drop_block(CUdeviceptr p) {
  for (Block **at = &blocks; *at; at = &(*at)->next) {
    Block *block = *at;
    if (block->base != p) continue;
    *at = block->next, held--;
    free((void *)p), free(block);
    return OK;
  }
  return INVALID_VALUE;
}
API cuMemAlloc_v2(CUdeviceptr *p, size_t n) {
  if (!n) return INVALID_VALUE;
  if (n > 1 << 26) return OUT_OF_MEMORY;
  *p = block_of(n);
  return *p ? OK : OUT_OF_MEMORY;
}
API cuMemFree_v2(CUdeviceptr p) { return current ? drop_block(p) : INVALID_VALUE; }
/* How many bytes there are from an address on that kernels may use; 0 outside of all memory. */
__attribute__((visibility("default"))) uint64_t stub_room(uint64_t p) {
  for (Block *b = blocks; b; b = b->next)
    if (b->base <= p && p < b->base + b->size) return b->base + b->size - p;
  return 0;
}
__attribute__((visibility("default"))) void stub_runner(Runner given) { runner = given; }
API cuMemHostAlloc(void **p, size_t n, unsigned flags) {
  *p = (void *)block_of(n);
  return flags == 1 ? OK : INVALID_VALUE;
}
API cuMemFreeHost(void *p) { return drop_block((CUdeviceptr)p); }
API cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void *from, size_t n, void *s) {
  if (!good(s, STREAM)) return INVALID_HANDLE;
  memcpy((void *)to, from, n);
  return OK;
}
API cuMemcpyDtoHAsync_v2(void *to, CUdeviceptr from, size_t n, void *s) {
  if (!good(s, STREAM)) return INVALID_HANDLE;
  memcpy(to, (void *)from, n);
  return OK;
}
API cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t n, void *s) {
  return cuMemcpyHtoDAsync_v2(to, (void *)from, n, s);
}
API cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t n, void *s) {
  if (!good(s, STREAM)) return INVALID_HANDLE;
  memset((void *)to, value, n);
  return OK;
}

static CUresult attribute(void *to, int which) { /* of any pointer: memory of GPU 0 */
  if (which == 1) *(void **)to = &context;
  else if (which == 2) *(unsigned *)to = 2;
  else if (which == 8 || which == 9) *(int *)to = 0;
  else return INVALID_VALUE;
  return OK;
}
API cuPointerGetAttribute(void *to, int which, CUdeviceptr p) { return p ? attribute(to, which) : 1; }
API cuPointerGetAttributes(unsigned n, int *which, void **to, CUdeviceptr p) {
  CUresult code = p ? OK : INVALID_VALUE;
  for (unsigned i = 0; i < n && !code; i++) code = attribute(to[i], which[i]);
  return code;
}

API cuStreamCreate(void **s, unsigned flags) { *s = make(sizeof(Handle), STREAM); return flags == 1 ? OK : 1; }
API cuStreamDestroy_v2(void *s) { return drop(s, STREAM); }
API cuStreamSynchronize(void *s) { return good(s, STREAM) ? OK : INVALID_HANDLE; }
API cuStreamWaitEvent(void *s, void *e, unsigned flags) {
  return good(s, STREAM) && good(e, EVENT) && !flags ? OK : INVALID_HANDLE;
}
API cuEventCreate(void **e, unsigned flags) { *e = make(sizeof(Handle), EVENT); return flags == 2 || !flags ? OK : 1; }
API cuEventElapsedTime_v2(float *ms, void *a, void *b) {
  *ms = 1;
  return good(a, EVENT) && good(b, EVENT) ? OK : INVALID_HANDLE;
}
API cuEventDestroy_v2(void *e) { return drop(e, EVENT); }
API cuEventRecord(void *e, void *s) { return good(s, STREAM) && good(e, EVENT) ? OK : INVALID_HANDLE; }
API cuEventQuery(void *e) { return good(e, EVENT) ? OK : INVALID_HANDLE; }
API cuEventSynchronize(void *e) { return good(e, EVENT) ? OK : INVALID_HANDLE; }

/* A map as the emulator has it: magic, address, sizes, strides, box, steps, rank, type, swizzle,
   and for columns of pixels the corners of their bounding box. */
static CUresult map(unsigned char *out, int type, unsigned rank, void *at, const uint64_t *sizes,
                    const uint64_t *strides, int interleave, int swizzle, int promotion, int fill) {
  static const int WIDTHS[] = {0, 32, 64, 128};
  if ((uintptr_t)out % 64 || (uintptr_t)at % 16 || !at || rank < 1 || rank > 5) return INVALID_VALUE;
  if (type < 0 || type > 9 || swizzle < 0 || swizzle > 3 || interleave || fill) return INVALID_VALUE;
  if (promotion < 0 || promotion > 3) return INVALID_VALUE;
  memset(out, 0, 128);
  memcpy(out, "tensormp", 8), memcpy(out + 8, &at, 8);
  for (unsigned i = 0; i < 5; i++) {
    uint64_t size = i < rank ? sizes[i] : 1, stride = i + 1 < rank ? strides[i] : 0;
    if (!size || size > 1ull << 32 || stride % 16 || stride >> 40) return INVALID_VALUE;
    memcpy(out + 16 + 8 * i, &size, 8), out[88 + 2 * i] = out[98 + i] = 1;
    if (i < 4) memcpy(out + 56 + 8 * i, &stride, 8);
  }
  out[103] = rank, out[104] = type, out[105] = WIDTHS[swizzle];
  return OK;
}
API cuTensorMapEncodeTiled(void *to, int type, unsigned rank, void *at, const uint64_t *sizes,
                           const uint64_t *strides, const uint32_t *box, const uint32_t *steps,
                           int interleave, int swizzle, int promotion, int fill) {
  unsigned char *out = to;
  CUresult code = map(out, type, rank, at, sizes, strides, interleave, swizzle, promotion, fill);
  for (unsigned i = 0; i < rank && !code; i++) {
    uint16_t wide = box[i];
    if (!box[i] || box[i] > 256 || steps[i] != 1) return INVALID_VALUE;
    memcpy(out + 88 + 2 * i, &wide, 2);
  }
  return code;
}
API cuTensorMapEncodeIm2col(void *to, int type, unsigned rank, void *at, const uint64_t *sizes,
                            const uint64_t *strides, const int *lower, const int *upper,
                            unsigned channels, unsigned pixels, const uint32_t *steps, int interleave,
                            int swizzle, int promotion, int fill) {
  unsigned char *out = to;
  if (rank < 3 || !channels || channels > 256 || !pixels || pixels > 1024) return INVALID_VALUE;
  CUresult code = map(out, type, rank, at, sizes, strides, interleave, swizzle, promotion, fill);
  int most = 1 << (rank == 3 ? 15 : rank == 4 ? 7 : 4);
  uint16_t column[] = {channels, pixels};
  memcpy(out + 88, column, 4);
  for (unsigned i = 0; i < rank && !code; i++) {
    if (!steps[i] || steps[i] > 8) return INVALID_VALUE;
    out[98 + i] = steps[i];
    if (i + 2 >= rank) continue;
    int16_t low = lower[i], high = upper[i];
    if (lower[i] < -most || lower[i] >= most || upper[i] < -most || upper[i] >= most) return INVALID_VALUE;
    memcpy(out + 109 + 2 * i, &low, 2), memcpy(out + 115 + 2 * i, &high, 2);
  }
  out[108] = 1;
  return code;
}

static CUresult fill(Node *n, const Params *p) {
  if (!good(p->func, KERNEL) || p->extra || !p->params) return INVALID_VALUE;
  n->p = *p;
  uint64_t *to = n->values;
  for (int i = 0; i < p->func->count; to += p->func->size[i++] / 8)
    memcpy(to, p->params[i], p->func->size[i]);
  return OK;
}
API cuGraphCreate(Graph **g, unsigned flags) { *g = make(sizeof **g, GRAPH); return flags ? 1 : OK; }
API cuGraphDestroy(Graph *g) { return drop(g, GRAPH); }
API cuGraphAddKernelNode_v2(Node **to, Graph *g, Node *const *deps, size_t n, const Params *p) {
  if (!good(g, GRAPH)) return INVALID_HANDLE;
  for (size_t i = 0; i < n; i++)
    if (!good(deps[i], NODE)) return INVALID_HANDLE;
  Node *made = make(sizeof *made, NODE);
  held--;
  made->deps = (int)n;
  *to = made;
  if (g->last) g->last->next = made; else g->first = made;
  g->last = made;
  return fill(made, p);
}
API cuGraphKernelNodeSetAttribute(Node *n, int which, const unsigned *value) {
  if (!good(n, NODE)) return INVALID_VALUE;
  if (which == 2) n->together = *value; /* cooperative */
  else if (which == 4) memcpy(n->cluster, value, sizeof n->cluster);
  else return INVALID_VALUE;
  return OK;
}
API cuGraphInstantiateWithFlags(Exec **to, Graph *g, unsigned long long flags) {
  if (!good(g, GRAPH) || flags) return INVALID_VALUE;
  *to = make(sizeof **to, EXEC);
  (*to)->graph = g;
  return OK;
}
API cuGraphExecDestroy(Exec *e) { return drop(e, EXEC); }
API cuGraphExecKernelNodeSetParams_v2(Exec *e, Node *n, const Params *p) {
  return good(e, EXEC) && good(n, NODE) ? fill(n, p) : INVALID_HANDLE;
}

static CUresult launch(Node *n) {
  const char *path = getenv("STUB_CUDA_LOG");
  FILE *log = path ? fopen(path, "a") : NULL;
  if (!n->cluster[0]) n->cluster[0] = n->cluster[1] = n->cluster[2] = 1;
  if (log)
    fprintf(log, "%s grid %u block %u shared %u cluster %u after %d%s\n", n->p.func->name,
            n->p.grid[0], n->p.block[0], n->p.shared, n->cluster[0], n->deps,
            n->together ? " together" : "");
  if (log) fclose(log);
  if (!runner) return NOT_FOUND;
  return runner(n->p.func->home->text, n->p.func->name, n->p.grid, n->p.block, n->cluster,
                n->p.shared, n->values);
}
API cuGraphLaunch(Exec *e, void *s) {
  if (!good(e, EXEC) || !good(s, STREAM) || !good(e->graph, GRAPH)) return INVALID_HANDLE;
  CUresult code = OK;
#ifndef STUB_NOTHING /* for benchmarks/gpu/host.py */
  for (Node *n = e->graph->first; n && !code; n = n->next) code = launch(n);
#endif
  return code;
}

__attribute__((visibility("default"))) int64_t stub_held(void) { return held; }

API cuGetProcAddress_v2(const char *name, void **to, int version, uint64_t flags, int *status) {
  (void)version, (void)flags;
  static const char *ENDS[] = {"", "_v2", "_v3", "WithFlags"};
  char full[128];
  *to = NULL;
  for (unsigned i = 3; i < 4 && !strcmp(name, "cuGraphInstantiate"); i++) {
    snprintf(full, sizeof full, "%s%s", name, ENDS[i]);
    *to = dlsym(RTLD_DEFAULT, full);
  }
  Dl_info here;
  dladdr((void *)cuInit, &here);
  void *self = dlopen(here.dli_fname, RTLD_NOW | RTLD_NOLOAD);
  for (unsigned i = 0; i < 4 && !*to; i++) {
    snprintf(full, sizeof full, "%s%s", name, ENDS[i]);
    *to = dlsym(self, full);
  }
  if (status) *status = *to ? 0 : 1;
  return *to ? OK : NOT_FOUND;
}
