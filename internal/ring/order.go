// Package ring holds what rings in shared memory are made of: stores with a stated ordering, a short lock, and the
// single-producer queue that a device's completions travel through.
package ring

// The order of stores on the data path.
//
// sync/atomic has only sequentially consistent stores: on amd64 an XCHG, which waits until every earlier store of the
// core is visible to the others. Publishing a ring entry needs less: the entry's bytes before its index. StoreRel32 and
// StoreRel64 are that store (a plain MOV on amd64, STLR on arm64, the sync/atomic store elsewhere and under the race
// detector). The assembly call also keeps the compiler from moving memory accesses across it.
//
// A release store may still be delayed past a later load of the same core. Where that matters (I publish, then look
// whether you sleep; you announce that you sleep, then look whether I published), the side that is about to do something
// slow issues a barrier on all cores instead, see softnic's asymmetric barrier.
