// The part of libdispatch that Metal host code uses. Implemented by ../../dispatch.cpp.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)

typedef struct dispatch_queue_s* dispatch_queue_t;
typedef struct dispatch_data_s* dispatch_data_t;
typedef void (*dispatch_function_t)(void*);
typedef void* dispatch_queue_attr_t;

#define DISPATCH_QUEUE_SERIAL ((dispatch_queue_attr_t)0)

dispatch_queue_t dispatch_queue_create(const char* label, dispatch_queue_attr_t attributes);
dispatch_queue_t dispatch_get_main_queue(void);
void dispatch_sync_f(dispatch_queue_t queue, void* context, dispatch_function_t work);
void dispatch_retain(void* object);
void dispatch_release(void* object);
size_t dispatch_data_get_size(dispatch_data_t data);

#ifdef __BLOCKS__
typedef void (^dispatch_block_t)(void);
void dispatch_sync(dispatch_queue_t queue, dispatch_block_t block);
#else
typedef void* dispatch_block_t;
#endif

// `destructor` null copies the bytes; _dispatch_data_destructor_free takes over malloc'ed ones; a block runs at the
// end.
dispatch_data_t dispatch_data_create(const void* buffer, size_t size, dispatch_queue_t queue,
                                     dispatch_block_t destructor);
extern const dispatch_block_t _dispatch_data_destructor_free;
#define DISPATCH_DATA_DESTRUCTOR_DEFAULT ((dispatch_block_t)0)
#define DISPATCH_DATA_DESTRUCTOR_FREE (_dispatch_data_destructor_free)

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
