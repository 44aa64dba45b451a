/* Stand-in for CANN's operators (libopapi), beside cann_stub.c: it computes nothing, and says on stderr what it is asked.
 *
 * aclnn kernels are told their arithmetic as cubeMathType: 0 keeps float32, 1 lets the chip go lower, 2 float16, 3 HF32.
 * Where the cube unit has no float32 all but 1 and 2 are refused, as ops-nn does (CheckCubeMathType, cube_util.cpp).
 *
 * Build: gcc -shared -fPIC -o DIR/libopapi.so opapi_stub.c
 */
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define ACLNN_ERR_PARAM_INVALID 161002
#define HANDLE(name) void *name(void) { return malloc(64); }
#define DESTROY(name) int name(void *handle) { free(handle); return 0; }

HANDLE(aclCreateTensor)
HANDLE(aclCreateScalar)
HANDLE(aclCreateIntArray)
HANDLE(aclCreateBoolArray)
HANDLE(aclCreateFloatArray)
HANDLE(aclCreateTensorList)
DESTROY(aclDestroyTensor)
DESTROY(aclDestroyScalar)
DESTROY(aclDestroyIntArray)
DESTROY(aclDestroyBoolArray)
DESTROY(aclDestroyFloatArray)
DESTROY(aclDestroyTensorList)

static int plan(const char *name, int8_t cube, uint64_t *workspace, void **executor) {
    const char *soc = getenv("STUB_SOC");
    bool has_float32 = !soc || (strcmp(soc, "Ascend910A") && strncmp(soc, "Ascend310P", 10));
    fprintf(stderr, "STUB aclnn %s cubeMathType=%d\n", name, cube);
    *workspace = 0;
    *executor = malloc(8);
    return has_float32 || cube == 1 || cube == 2 ? 0 : ACLNN_ERR_PARAM_INVALID;
}

int aclnnConvolutionGetWorkspaceSize(void *input, void *weight, void *bias, void *stride, void *padding, void *dilation,
                                     bool transposed, void *output_padding, int64_t groups, void *output, int8_t cube,
                                     uint64_t *workspace, void **executor) {
    return plan("Convolution", cube, workspace, executor);
}
int aclnnConvolution(void *workspace, uint64_t size, void *executor, void *stream) { free(executor); return 0; }
int aclnnMatmulGetWorkspaceSize(void *a, void *b, void *output, int8_t cube, uint64_t *workspace, void **executor) {
    return plan("Matmul", cube, workspace, executor);
}
int aclnnMatmul(void *workspace, uint64_t size, void *executor, void *stream) { free(executor); return 0; }
