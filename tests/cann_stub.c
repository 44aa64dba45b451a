/* Stand-in for the CANN libraries, for contract tests only: with it the real torch_npu imports, shows devices, starts
 * its threads, allocates (host memory plays the device's) and copies. It computes nothing: kernels do not exist.
 *
 * Devices: those of ASCEND_RT_VISIBLE_DEVICES, else STUB_NPU_COUNT. STUB_SOC names the chip.
 *
 * Build (gcc, x86_64 or aarch64), with DIR on LD_LIBRARY_PATH before torch_npu/lib:
 *   for l in ascendcl acl_op_compiler hccl; do gcc -shared -fPIC -o DIR/lib$l.so cann_stub.c; done
 *   for l in ge_runner graph acl_tdt_channel; do gcc -shared -fPIC -x c -o DIR/lib$l.so /dev/null; done
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define NOTHING(name) long name(void) { return 0; }

static __thread int current;

static int new_handle(void **handle) {
    *handle = malloc(64);
    return 0;
}

/* Devices. */
int aclrtGetDeviceCount(unsigned *count) {
    const char *visible = getenv("ASCEND_RT_VISIBLE_DEVICES"), *all = getenv("STUB_NPU_COUNT");
    if (!visible) {
        *count = all ? atoi(all) : 0;
        return 0;
    }
    *count = *visible ? 1 : 0;
    for (; *visible; visible++) *count += *visible == ',';
    return 0;
}
int aclrtSetDevice(int device) { current = device; return 0; }
int aclrtGetDevice(int *device) { *device = current; return 0; }
int aclrtGetCurrentContext(void **context) { return new_handle(context); }
const char *aclrtGetSocName(void) { const char *soc = getenv("STUB_SOC"); return soc ? soc : "Ascend910B3"; }
const char *aclGetRecentErrMsg(void) { return "stub"; }
long aclrtGetSysParamOpt(int option, int64_t *value) { *value = 0; return 0; }

/* Streams and events: all is done at once. */
int aclrtCreateStream(void **stream) { return new_handle(stream); }
int aclrtCreateStreamWithConfig(void **stream) { return new_handle(stream); }
int aclrtCreateEventExWithFlag(void **event) { return new_handle(event); }
int aclrtCreateEventWithFlag(void **event) { return new_handle(event); }
int aclrtQueryEventStatus(void *event, int *status) { *status = 1; return 0; }      /* recorded and complete */
int aclrtQueryEventWaitStatus(void *event, int *status) { *status = 0; return 0; }  /* complete */

/* Memory. */
int aclrtMalloc(void **memory, size_t size, int policy) { *memory = malloc(size + 4096); return 0; }
int aclrtMallocAlign32(void **memory, size_t size, int policy) { *memory = malloc(size + 4096); return 0; }
int aclrtMallocHost(void **memory, size_t size) { *memory = malloc(size); return 0; }
int aclrtFree(void *memory) { free(memory); return 0; }
int aclrtFreeHost(void *memory) { free(memory); return 0; }
int aclrtGetMemInfo(int kind, size_t *available, size_t *total) { *available = *total = 32UL << 30; return 0; }
int aclrtMemcpy(void *to, size_t room, const void *from, size_t size, int kind) { memcpy(to, from, size); return 0; }
int aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t size, int kind, void *stream) {
    memcpy(to, from, size);
    return 0;
}
int aclrtMallocPhysical(void **handle, size_t size, const void *properties, uint64_t flags) {
    return new_handle(handle);
}
int aclrtReserveMemAddress(void **memory, size_t size, size_t alignment, void *wanted, uint64_t flags) {
    *memory = mmap(wanted, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return *memory == MAP_FAILED;
}

/* Operators that are compiled, and how: said on stderr. */
char precision[64]; /* one for all of the libraries that are made of this file */
int aclSetCompileopt(int option, const char *value) {
    if (option == 0) snprintf(precision, sizeof precision, "%s", value); /* ACL_PRECISION_MODE */
    return 0;
}
int aclopCompileAndExecute(const char *name) {
    fprintf(stderr, "STUB aclop %s %s\n", name, precision);
    return 0;
}

/* Succeed and do nothing. */
NOTHING(MsprofGetHashId)
NOTHING(MsprofRegisterCallback)
NOTHING(MsprofReportAdditionalInfo)
NOTHING(MsprofReportApi)
NOTHING(MsprofReportCompactInfo)
NOTHING(MsprofSysCycleTime)
NOTHING(aclAppLog)
NOTHING(aclCreateDataBuffer)
NOTHING(aclCreateTensorDesc)
NOTHING(aclDestroyDataBuffer)
NOTHING(aclDestroyTensorDesc)
NOTHING(aclFinalize)
NOTHING(aclGetDeviceCapability)
NOTHING(aclGetTensorDescDimV2)
NOTHING(aclGetTensorDescFormat)
NOTHING(aclGetTensorDescNumDims)
NOTHING(aclGetTensorDescType)
NOTHING(aclInit)
NOTHING(aclSetTensorDescName)
NOTHING(aclSetTensorFormat)
NOTHING(aclSetTensorPlaceMent)
NOTHING(aclSetTensorShape)
NOTHING(aclmdlFinalizeDump)
NOTHING(aclmdlInitDump)
NOTHING(aclmdlSetDump)
NOTHING(aclopCreateAttr)
NOTHING(aclopDestroyAttr)
NOTHING(aclopSetAttrBool)
NOTHING(aclopSetAttrDataType)
NOTHING(aclopSetAttrFloat)
NOTHING(aclopSetAttrInt)
NOTHING(aclopSetAttrListBool)
NOTHING(aclopSetAttrListFloat)
NOTHING(aclopSetAttrListInt)
NOTHING(aclopSetAttrListListInt)
NOTHING(aclopSetAttrString)
NOTHING(aclrtBinaryGetFunction)
NOTHING(aclrtBinaryLoadFromData)
NOTHING(aclrtCtxSetSysParamOpt)
NOTHING(aclrtDestroyEvent)
NOTHING(aclrtDestroyStream)
NOTHING(aclrtDestroyStreamForce)
NOTHING(aclrtDeviceCanAccessPeer)
NOTHING(aclrtDeviceEnablePeerAccess)
NOTHING(aclrtDeviceGetBareTgid)
NOTHING(aclrtEventElapsedTime)
NOTHING(aclrtFreePhysical)
NOTHING(aclrtGetFunctionAddr)
NOTHING(aclrtMapMem)
NOTHING(aclrtMemExportToShareableHandle)
NOTHING(aclrtMemImportFromShareableHandle)
NOTHING(aclrtMemSetPidToShareableHandle)
NOTHING(aclrtMemset)
NOTHING(aclrtProcessReport)
NOTHING(aclrtRecordEvent)
NOTHING(aclrtReleaseMemAddress)
NOTHING(aclrtResetDevice)
NOTHING(aclrtResetEvent)
NOTHING(aclrtSetCurrentContext)
NOTHING(aclrtSetDeviceSatMode)
NOTHING(aclrtSetOpExecuteTimeOut)
NOTHING(aclrtSetStreamOverflowSwitch)
NOTHING(aclrtStreamWaitEvent)
NOTHING(aclrtSynchronizeDeviceWithTimeout)
NOTHING(aclrtSynchronizeEvent)
NOTHING(aclrtSynchronizeStream)
NOTHING(aclrtUnmapMem)
NOTHING(rtDevBinaryRegister)
NOTHING(rtFunctionRegister)
NOTHING(rtGetC2cCtrlAddr)
NOTHING(rtKernelLaunch)
