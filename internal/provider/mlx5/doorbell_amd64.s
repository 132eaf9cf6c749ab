//go:build linux

#include "textflag.h"

// func doorbell(record *recordWord, v uint32, reg *register, word uint64)
TEXT ·doorbell(SB), NOSPLIT, $0-32
	MOVQ record+0(FP), AX
	MOVL v+8(FP), CX
	MOVQ reg+16(FP), DX
	MOVQ word+24(FP), BX
	MOVL CX, (AX)
	SFENCE // the record before the register
	MOVQ BX, (DX)
	SFENCE // out of the write-combining buffer
	RET

// func blueFlame(record *recordWord, v uint32, reg *register, wqe, start, end *byte, blocks int)
TEXT ·blueFlame(SB), NOSPLIT, $0-56
	MOVQ record+0(FP), AX
	MOVL v+8(FP), CX
	MOVQ reg+16(FP), DX
	MOVQ wqe+24(FP), SI
	MOVQ start+32(FP), DI
	MOVQ end+40(FP), R8
	MOVQ blocks+48(FP), R9
	MOVL CX, (AX)
	SFENCE

block: // in words, as the element was written: wider loads would wait for the store buffer
	MOVQ    (SI), R10
	MOVQ    8(SI), R11
	MOVQ    16(SI), R12
	MOVQ    24(SI), R13
	MOVQ    R10, (DX)
	MOVQ    R11, 8(DX)
	MOVQ    R12, 16(DX)
	MOVQ    R13, 24(DX)
	MOVQ    32(SI), R10
	MOVQ    40(SI), R11
	MOVQ    48(SI), R12
	MOVQ    56(SI), R13
	MOVQ    R10, 32(DX)
	MOVQ    R11, 40(DX)
	MOVQ    R12, 48(DX)
	MOVQ    R13, 56(DX)
	ADDQ    $64, SI
	ADDQ    $64, DX
	CMPQ    SI, R8
	CMOVQEQ DI, SI // round the end of the queue
	DECQ    R9
	JNZ     block
	SFENCE
	RET

// func publish(record *recordWord, v uint32)
TEXT ·publish(SB), NOSPLIT, $0-12
	MOVQ record+0(FP), AX
	MOVL v+8(FP), CX
	MOVL CX, (AX)
	RET

// func consumed(record *recordWord, v uint32)
TEXT ·consumed(SB), NOSPLIT, $0-12
	MOVQ record+0(FP), AX
	MOVL v+8(FP), CX
	MOVL CX, (AX)
	RET

// func fromDevice()
// Loads of ordinary memory keep their order: the call is only a compiler barrier, as dma_rmb of the kernel is here.
TEXT ·fromDevice(SB), NOSPLIT, $0-0
	RET
