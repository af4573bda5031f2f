/* A CUDA runtime without a GPU: what a CUDA build of torch calls, answered on a machine that has none.
 *
 * Device memory is the host's and starts as zeros, small blocks as 0x3f bytes: finite and positive
 * numbers in every format, as a loss and a norm have to be. Copies are made; kernels, fills, cuBLAS
 * and NCCL calls compute nothing. A collective is one rank's: input becomes output. Whatever is not
 * written here does nothing and succeeds (runtime.py). cuDNN is not simulated.
 */
#define _GNU_SOURCE
/* These want headers that torch's wheels do not bring; of them only the types' names are needed. */
#define __CUDA_FP16_H__
#define __CUDA_BF16_H__
#define __CUDA_RUNTIME_H__
typedef struct { unsigned short bits; } __half, __nv_bfloat16;
#include <cublasLt.h>
#include <cublas_v2.h>
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <nccl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define OK 0
#define MULTIPROCESSORS 132
#define MEMORY (140ull << 30)
#define SMALL (2 << 20)

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static __thread int device;

/* The trace between these two calls: a line for each copy, wait and kernel, of cuBLAS's the products
 * that a model's layers take. */

static FILE *trace;

void begin_trace(const char *path) { trace = fopen(path, "w"); }

void end_trace(void) {
    fclose(trace);
    trace = NULL;
}

static void note(const char *kind, const char *what) {
    pthread_mutex_lock(&lock);
    if (trace) fprintf(trace, "%s %s\n", kind, what);
    pthread_mutex_unlock(&lock);
}

static void note_bytes(const char *kind, size_t bytes, int direction) {
    char text[64];
    snprintf(text, sizeof text, "%zu %d", bytes, direction);
    note(kind, text);
}

/* Streams, events, handles of libraries: numbers that nobody looks at. */

static uintptr_t last_handle = 0x1000;
#define NEW_HANDLE ((void *)__sync_add_and_fetch(&last_handle, 16))

/* Memory */

static struct { char *start; size_t bytes; int device; } blocks[1 << 16];
static int num_blocks;
static size_t used;

static int block_of(const void *pointer) {
    for (int i = 0; i < num_blocks; i++)
        if ((char *)pointer >= blocks[i].start && (char *)pointer < blocks[i].start + blocks[i].bytes)
            return i;
    return -1;
}

cudaError_t cudaMalloc(void **pointer, size_t wanted) {
    size_t bytes = wanted ? (wanted + SMALL - 1) & ~(size_t)(SMALL - 1) : SMALL;
    pthread_mutex_lock(&lock);
    int fits = used + bytes <= MEMORY && num_blocks < 1 << 16;
    void *start = fits ? mmap(NULL, bytes, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
                       : MAP_FAILED;
    if (start != MAP_FAILED) {
        if (wanted <= SMALL) memset(start, 0x3f, wanted);
        blocks[num_blocks].start = start;
        blocks[num_blocks].bytes = bytes;
        blocks[num_blocks++].device = device;
        used += bytes;
        *pointer = start;
    }
    pthread_mutex_unlock(&lock);
    return start == MAP_FAILED ? cudaErrorMemoryAllocation : OK;
}

cudaError_t cudaFree(void *pointer) {
    pthread_mutex_lock(&lock);
    int i = pointer ? block_of(pointer) : -1;
    if (i >= 0) {
        munmap(blocks[i].start, blocks[i].bytes);
        used -= blocks[i].bytes;
        blocks[i] = blocks[--num_blocks];
    }
    pthread_mutex_unlock(&lock);
    return OK;
}

cudaError_t cudaMallocAsync(void **pointer, size_t bytes, cudaStream_t stream) { return cudaMalloc(pointer, bytes); }
cudaError_t cudaFreeAsync(void *pointer, cudaStream_t stream) { return cudaFree(pointer); }
cudaError_t cudaHostAlloc(void **pointer, size_t bytes, unsigned flags) { return posix_memalign(pointer, 4096, bytes); }
cudaError_t cudaMallocHost(void **pointer, size_t bytes) { return posix_memalign(pointer, 4096, bytes); }
cudaError_t cudaFreeHost(void *pointer) { free(pointer); return OK; }
cudaError_t cudaGetSymbolAddress(void **pointer, const void *symbol) { return cudaMalloc(pointer, 4096); }

cudaError_t cudaMemGetInfo(size_t *available, size_t *total) {
    *total = MEMORY;
    *available = MEMORY - used;
    return OK;
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *pointer) {
    memset(attributes, 0, sizeof *attributes);
    pthread_mutex_lock(&lock);
    int i = block_of(pointer);
    attributes->type = i < 0 ? cudaMemoryTypeUnregistered : cudaMemoryTypeDevice;
    if (i >= 0) attributes->device = blocks[i].device;
    pthread_mutex_unlock(&lock);
    attributes->devicePointer = attributes->hostPointer = (void *)pointer;
    return OK;
}

static cudaError_t copy(void *to, const void *from, size_t bytes, int direction) {
    memmove(to, from, bytes);
    note_bytes("copy", bytes, direction);
    return OK;
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t stream) { return copy(to, from, bytes, kind); }
cudaError_t cudaMemcpyPeerAsync(void *to, int a, const void *from, int b, size_t bytes, cudaStream_t stream) { return copy(to, from, bytes, cudaMemcpyDeviceToDevice); }

cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
    note("wait", "copy");
    return copy(to, from, bytes, kind);
}

/* The device */

static int capability(int minor) {
    int parts[2] = {8, 0};
    const char *text = getenv("SIMULATED_GPU_CAPABILITY");
    if (text) sscanf(text, "%d.%d", &parts[0], &parts[1]);
    return parts[minor];
}

cudaError_t cudaGetDeviceCount(int *count) { *count = 8; return OK; }
cudaError_t cudaGetDevice(int *number) { *number = device; return OK; }
cudaError_t cudaSetDevice(int number) { device = number; return OK; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = CUDART_VERSION; return OK; }
cudaError_t cudaDriverGetVersion(int *version) { *version = CUDART_VERSION; return OK; }
cudaError_t cudaDeviceCanAccessPeer(int *can, int from, int to) { *can = 1; return OK; }
const char *cudaGetErrorString(cudaError_t error) { return "an error of the simulated GPU"; }
const char *cudaGetErrorName(cudaError_t error) { return "cudaErrorSimulated"; }

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *least = 0;
    *greatest = -5;
    return OK;
}

cudaError_t cudaDeviceGetPCIBusId(char *text, int length, int number) {
    snprintf(text, length, "0000:0%d:00.0", number);
    return OK;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int number) {
    switch (attribute) {
        case cudaDevAttrComputeCapabilityMajor: *value = capability(0); break;
        case cudaDevAttrComputeCapabilityMinor: *value = capability(1); break;
        case cudaDevAttrMultiProcessorCount: *value = MULTIPROCESSORS; break;
        case cudaDevAttrMaxSharedMemoryPerBlock: *value = 48 << 10; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 227 << 10; break;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = 228 << 10; break;
        case cudaDevAttrMaxRegistersPerMultiprocessor: *value = 65536; break;
        case cudaDevAttrMaxRegistersPerBlock: *value = 65536; break;
        case cudaDevAttrWarpSize: *value = 32; break;
        case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
        case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
        case cudaDevAttrClockRate: *value = 1980000; break;
        default: *value = 1;
    }
    return OK;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int number) {
    memset(p, 0, sizeof *p);
    strcpy(p->name, "simulated GPU");
    p->major = capability(0);
    p->minor = capability(1);
    p->totalGlobalMem = MEMORY;
    p->multiProcessorCount = MULTIPROCESSORS;
    p->sharedMemPerBlock = 48 << 10;
    p->sharedMemPerBlockOptin = 227 << 10;
    p->sharedMemPerMultiprocessor = 228 << 10;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->warpSize = 32;
    p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 2147483647;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->maxThreadsPerMultiProcessor = 2048;
    p->maxBlocksPerMultiProcessor = 32;
    p->l2CacheSize = 50 << 20;
    p->unifiedAddressing = p->concurrentKernels = p->cooperativeLaunch = 1;
    return OK;
}

/* Streams and events: everything has happened when its call returns. */

cudaError_t cudaStreamCreate(cudaStream_t *stream) { *stream = NEW_HANDLE; return OK; }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) { *stream = NEW_HANDLE; return OK; }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) { *stream = NEW_HANDLE; return OK; }
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) { *priority = 0; return OK; }
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) { *status = cudaStreamCaptureStatusNone; return OK; }
cudaError_t cudaStreamSynchronize(cudaStream_t stream) { note("wait", "stream"); return OK; }
cudaError_t cudaDeviceSynchronize(void) { note("wait", "device"); return OK; }
cudaError_t cudaEventSynchronize(cudaEvent_t event) { note("wait", "event"); return OK; }
cudaError_t cudaEventCreate(cudaEvent_t *event) { *event = NEW_HANDLE; return OK; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) { *event = NEW_HANDLE; return OK; }
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t start, cudaEvent_t end) { *ms = 1; return OK; }
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *data) { function(data); return OK; }

#if CUDART_VERSION >= 13000
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id, cudaGraph_t *graph, const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges, size_t *count) {
    return cudaStreamIsCapturing(stream, status);
}
#endif

/* Kernels: a program registers each by its host function, which is what a launch then names. */

static struct { const void *function; const char *name; } *kernels;
static size_t num_kernels, kernel_slots;

static size_t slot_of(const void *function) {
    size_t slot = ((uintptr_t)function >> 4) * 0x9e3779b97f4a7c15ull & (kernel_slots - 1);
    while (kernels[slot].function && kernels[slot].function != function) slot = (slot + 1) & (kernel_slots - 1);
    return slot;
}

void __cudaRegisterFunction(void **handle, const char *function, char *symbol, const char *name, int limit, void *thread, void *block, void *b, void *g, int *warp) {
    pthread_mutex_lock(&lock);
    if (!kernels) kernels = calloc(kernel_slots = 1 << 19, sizeof *kernels);
    size_t slot = slot_of(function);
    if (num_kernels++ < kernel_slots / 2) {
        kernels[slot].function = function;
        kernels[slot].name = name;
    }
    pthread_mutex_unlock(&lock);
}

void **__cudaRegisterFatBinary(void *binary) { static void *handle; return &handle; }
void __cudaRegisterFatBinaryEnd(void **handle) {}
void __cudaRegisterVar(void **handle, char *variable, char *symbol, const char *name, int external, size_t bytes, int constant, int global) {}
void __cudaUnregisterFatBinary(void **handle) {}
char __cudaInitModule(void **handle) { return 0; }

static __thread struct { dim3 grid, block; size_t shared; void *stream; } configuration;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
    configuration.grid = grid;
    configuration.block = block;
    configuration.shared = shared;
    configuration.stream = stream;
    return OK;
}

cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    *grid = configuration.grid;
    *block = configuration.block;
    *shared = configuration.shared;
    *(void **)stream = configuration.stream;
    return OK;
}

static cudaError_t launch(const void *function) {
    const char *name = kernels ? kernels[slot_of(function)].name : NULL;
    note("kernel", name ? name : "unknown");
    return OK;
}

cudaError_t __cudaGetKernel(void **kernel, const void *function) { *kernel = (void *)function; return OK; }
cudaError_t __cudaLaunchKernel(void *kernel, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream) { return launch(kernel); }
cudaError_t cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream) { return launch(function); }
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *function, void **arguments) { return launch(function); }
cudaError_t cudaLaunchCooperativeKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream) { return launch(function); }

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *function) {
    memset(attributes, 0, sizeof *attributes);
    attributes->maxThreadsPerBlock = 1024;
    attributes->numRegs = 64;
    attributes->ptxVersion = attributes->binaryVersion = 10 * capability(0);
    return OK;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *function, int threads, size_t shared) { *blocks = 4; return OK; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *function, int threads, size_t shared, unsigned flags) { *blocks = 4; return OK; }

/* The driver, which Triton calls itself and others ask for by name. */

static int nothing(void) { return OK; }

static void *by_name(const char *name) {
    void *function = dlsym(RTLD_DEFAULT, name);
    return function ? function : (void *)nothing;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version, unsigned long long flags, enum cudaDriverEntryPointQueryResult *result) {
    *function = by_name(name);
    if (result) *result = cudaDriverEntryPointSuccess;
    return OK;
}

CUresult cuDriverGetVersion(int *version) { *version = CUDART_VERSION; return OK; }
CUresult cuDeviceGetCount(int *count) { *count = 8; return OK; }
CUresult cuDeviceGet(CUdevice *found, int number) { *found = number; return OK; }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice number) { return cudaDeviceGetAttribute(value, (enum cudaDeviceAttr)attribute, number); }
CUresult cuDevicePrimaryCtxGetState(CUdevice number, unsigned *flags, int *active) { *flags = 0; *active = 1; return OK; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice number) { *context = (CUcontext)1; return OK; }
CUresult cuCtxGetCurrent(CUcontext *context) { *context = (CUcontext)1; return OK; }
CUresult cuCtxGetDevice(CUdevice *number) { *number = device; return OK; }
CUresult cuGetErrorString(CUresult error, const char **text) { *text = "an error of the simulated driver"; return OK; }
CUresult cuModuleLoadData(CUmodule *module, const void *image) { *module = NEW_HANDLE; return OK; }
CUresult cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned count, CUjit_option *options, void **values) { *module = NEW_HANDLE; return OK; }
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) { *function = (CUfunction)strdup(name); return OK; }

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
    *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
    return OK;
}

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
    if (attribute == CU_POINTER_ATTRIBUTE_DEVICE_POINTER) *(CUdeviceptr *)value = pointer;
    else *(int *)value = 0;
    return OK;
}

CUresult cuLaunchKernel(CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, CUstream stream, void **arguments, void **extra) {
    note("kernel", (const char *)function);
    return OK;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **arguments, void **extra) {
    note("kernel", (const char *)function);
    return OK;
}

/* cuBLAS */

cublasStatus_t cublasCreate_v2(cublasHandle_t *handle) { *handle = NEW_HANDLE; return OK; }
cublasStatus_t cublasGetMathMode(cublasHandle_t handle, cublasMath_t *mode) { *mode = 0; return OK; }
cublasStatus_t cublasGetPointerMode_v2(cublasHandle_t handle, cublasPointerMode_t *mode) { *mode = 0; return OK; }
cublasStatus_t cublasLtCreate(cublasLtHandle_t *handle) { *handle = NEW_HANDLE; return OK; }
cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *made, cublasComputeType_t compute, cudaDataType_t type) { *made = NEW_HANDLE; return OK; }
cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *made, cudaDataType_t type, uint64_t rows, uint64_t columns, int64_t leading) { *made = NEW_HANDLE; return OK; }
cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *made) { *made = NEW_HANDLE; return OK; }
size_t cublasLtGetVersion(void) { return CUBLAS_VERSION; }
size_t cublasLtGetCudartVersion(void) { return CUDART_VERSION; }

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle, cublasLtMatmulDesc_t what, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d, cublasLtMatmulPreference_t preference, int wanted, cublasLtMatmulHeuristicResult_t *results, int *found) {
    memset(results, 0, sizeof *results);
    *found = 1;
    return OK;
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t what, const void *alpha, const void *a, cublasLtMatrixLayout_t of_a, const void *b, cublasLtMatrixLayout_t of_b, const void *beta, const void *c, cublasLtMatrixLayout_t of_c, void *d, cublasLtMatrixLayout_t of_d, const cublasLtMatmulAlgo_t *algorithm, void *workspace, size_t bytes, cudaStream_t stream) {
    note("kernel", "cublasLtMatmul");
    return OK;
}

cublasStatus_t cublasGemmEx(cublasHandle_t handle, cublasOperation_t of_a, cublasOperation_t of_b, int m, int n, int k, const void *alpha, const void *a, cudaDataType type_a, int lda, const void *b, cudaDataType type_b, int ldb, const void *beta, void *c, cudaDataType type_c, int ldc, cublasComputeType_t compute, cublasGemmAlgo_t algorithm) {
    char text[80];
    snprintf(text, sizeof text, "cublasGemmEx %d %d %d type %d", m, n, k, type_c);
    note("kernel", text);
    return OK;
}

cublasStatus_t cublasSgemm_v2(cublasHandle_t handle, cublasOperation_t of_a, cublasOperation_t of_b, int m, int n, int k, const float *alpha, const float *a, int lda, const float *b, int ldb, const float *beta, float *c, int ldc) {
    note("kernel", "cublasSgemm");
    return OK;
}

/* The profiler, of which there is nothing to see. */

cudaError_t cudaProfilerStart(void) { return OK; }
cudaError_t cudaProfilerStop(void) { return OK; }

/* NCCL */

ncclResult_t ncclGetVersion(int *version) { *version = NCCL_VERSION_CODE; return OK; }
const char *ncclGetErrorString(ncclResult_t result) { return "an error of the simulated NCCL"; }
const char *ncclGetLastError(ncclComm_t comm) { return "an error of the simulated NCCL"; }
ncclResult_t ncclCommInitRankConfig(ncclComm_t *comm, int ranks, ncclUniqueId id, int rank, ncclConfig_t *config) { *comm = NEW_HANDLE; return OK; }
ncclResult_t ncclCommSplit(ncclComm_t comm, int color, int key, ncclComm_t *made, ncclConfig_t *config) { *made = NEW_HANDLE; return OK; }
ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t *error) { *error = OK; return OK; }
ncclResult_t ncclCommCount(ncclComm_t comm, int *ranks) { *ranks = 1; return OK; }
ncclResult_t ncclCommUserRank(ncclComm_t comm, int *rank) { *rank = 0; return OK; }

static ncclResult_t collective(const char *name, const void *from, void *to, size_t count, ncclDataType_t type) {
    static const int bytes_of[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};
    size_t bytes = count * bytes_of[type];
    if (bytes < SMALL) memmove(to, from, bytes); /* of what is large nobody reads a value */
    note("kernel", name);
    return OK;
}

ncclResult_t ncclAllReduce(const void *from, void *to, size_t count, ncclDataType_t type, ncclRedOp_t operation, ncclComm_t comm, cudaStream_t stream) { return collective("ncclAllReduce", from, to, count, type); }
ncclResult_t ncclBroadcast(const void *from, void *to, size_t count, ncclDataType_t type, int root, ncclComm_t comm, cudaStream_t stream) { return collective("ncclBroadcast", from, to, count, type); }
ncclResult_t ncclAllGather(const void *from, void *to, size_t count, ncclDataType_t type, ncclComm_t comm, cudaStream_t stream) { return collective("ncclAllGather", from, to, count, type); }
ncclResult_t ncclReduceScatter(const void *from, void *to, size_t count, ncclDataType_t type, ncclRedOp_t operation, ncclComm_t comm, cudaStream_t stream) { return collective("ncclReduceScatter", from, to, count, type); }
