#pragma once

#include "objc.h"

#ifdef __cplusplus
extern "C" {
#endif

OBJC_EXPORT Class objc_lookUpClass(const char* name);
OBJC_EXPORT Class objc_getClass(const char* name);
OBJC_EXPORT Protocol* objc_getProtocol(const char* name);
OBJC_EXPORT SEL sel_registerName(const char* name);
OBJC_EXPORT const char* sel_getName(SEL selector);

OBJC_EXPORT void* objc_autoreleasePoolPush(void);
OBJC_EXPORT void objc_autoreleasePoolPop(void* pool);
OBJC_EXPORT id objc_retain(id object);
OBJC_EXPORT void objc_release(id object);
OBJC_EXPORT id objc_autorelease(id object);

#ifdef __cplusplus
}
#endif
