#include "translator.h"

static LLVMTypeRef element_of(LLVMTypeRef type) {
  return LLVMGetTypeKind(type) == LLVMVectorTypeKind ? LLVMGetElementType(type) : type;
}

bool is_bfloat(LLVMTypeRef type) { return LLVMGetTypeKind(element_of(type)) == LLVMBFloatTypeKind; }

unsigned bits_of(LLVMTypeRef type) {
  type = element_of(type);
  switch (LLVMGetTypeKind(type)) {
    case LLVMIntegerTypeKind: {
      const unsigned width = LLVMGetIntTypeWidth(type);
      if (width != 1 && (width < 8 || width > 64 || (width & (width - 1)))) break;
      return width;
    }
    case LLVMHalfTypeKind:
    case LLVMBFloatTypeKind: return 16;
    case LLVMFloatTypeKind: return 32;
    case LLVMDoubleTypeKind: return 64;
    case LLVMPointerTypeKind: return LLVMGetPointerAddressSpace(type) == kThreadgroupSpace ? 32 : 64;
    default: break;
  }
  die(LLVMPrintTypeToString(type), NULL);
}

unsigned components_of(LLVMTypeRef type) {
  return LLVMGetTypeKind(type) == LLVMVectorTypeKind ? LLVMGetVectorSize(type) : 1;
}
