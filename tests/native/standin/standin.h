/* Control of the stand-in for libcuda.so.1: plain C, so that a test in any language can call it.
 *
 * The stand-in has the entry points that elastickv uses, over pages of this machine's memory. Fresh memory is full of
 * 0xA5, an address with nothing mapped or no access faults, and each device has its own total. Device 0 and 1 are GPUs,
 * the last of three or more is a MIG instance. All functions are thread-safe. State is per process; a forked child must
 * reset it before use, as CUDA does not work there either. */
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Forgets everything, unmaps everything, and starts again with this many devices of so many bytes each. 0: the
 * defaults, 3 devices, 256 MiB, granularity 2 MiB, driver version 13000. */
void standin_reset(int devices, uint64_t total_bytes, uint64_t granularity, int version);

/* As an engine that starts CUDA on the device would: its primary context becomes active. */
void standin_start_engine(int device);
int standin_context_references(int device); /* retains less releases, the engine's own not counted */

/* The nth call from now (1 is the next) of a function, by its name in the library, returns this error and does nothing.
 */
void standin_fail(const char *function, int nth, int code);
/* The nth call from now of whatever function does, and how many calls there were of all of them. */
void standin_fail_any(int nth, int code);
uint64_t standin_all_calls(void);
/* How many orders to fail have not been met yet, and taking all of them back. */
int standin_pending(void);
void standin_heal(void);
/* Every call of it sleeps first; 0 ends that. */
void standin_delay(const char *function, unsigned microseconds);
uint64_t standin_calls(const char *function);

/* While held, nothing on the stream completes: events stay unready, fills are not carried out. NULL: the default
 * stream. Letting go carries everything out in order. */
void standin_hold(void *stream, int held);
/* Streams made from now on are held from the start. */
void standin_hold_new_streams(int held);
/* Every stream, those to come too. */
void standin_hold_all(void);
/* Lets go of every stream. */
void standin_let_all_go(void);

/* Enqueues work on the stream that will touch the range: a kernel of the engine. */
void standin_work(void *stream, uint64_t address, uint64_t bytes);

/* Violations: a range unmapped while enqueued work that touches it has not completed, work on a range that is not
 * mapped and accessible when it is carried out. With `strict`, also any unmapping while a recorded event has not
 * completed. */
void standin_strict(int strict);
uint64_t standin_violations(void);
const char *standin_last_violation(void); /* valid until the next call of this thread */

uint64_t standin_used_bytes(int device);
/* Things alive: "reservations", "memory", "mappings", "streams", "events". */
uint64_t standin_alive(const char *kind);

#ifdef __cplusplus
}
#endif
