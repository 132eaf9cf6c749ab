//go:build linux

#include "textflag.h"

// func doorbell(record *recordWord, v uint32, reg *register, word uint64)
TEXT ·doorbell(SB), NOSPLIT, $0-32
	MOVD  record+0(FP), R0
	MOVWU v+8(FP), R1
	MOVD  reg+16(FP), R2
	MOVD  word+24(FP), R3
	DMB   $2  // OSHST: the elements before the record
	MOVW  R1, (R0)
	DSB   $14 // ST: the record before the register
	MOVD  R3, (R2)
	DSB   $14 // out of the write-combining buffer
	RET

// func blueFlame(record *recordWord, v uint32, reg *register, wqe, start, end *byte, blocks int)
TEXT ·blueFlame(SB), NOSPLIT, $0-56
	MOVD  record+0(FP), R0
	MOVWU v+8(FP), R1
	MOVD  reg+16(FP), R2
	MOVD  wqe+24(FP), R3
	MOVD  start+32(FP), R4
	MOVD  end+40(FP), R5
	MOVD  blocks+48(FP), R6
	DMB   $2
	MOVW  R1, (R0)
	DSB   $14

block:
	VLD1.P 64(R3), [V0.B16, V1.B16, V2.B16, V3.B16]
	VST1.P [V0.B16, V1.B16, V2.B16, V3.B16], 64(R2)
	CMP    R5, R3
	CSEL   EQ, R4, R3, R3 // round the end of the queue
	SUBS   $1, R6, R6
	BNE    block
	DSB    $14
	RET

// func publish(record *recordWord, v uint32)
TEXT ·publish(SB), NOSPLIT, $0-12
	MOVD  record+0(FP), R0
	MOVWU v+8(FP), R1
	DMB   $2 // OSHST
	MOVW  R1, (R0)
	RET

// func consumed(record *recordWord, v uint32)
TEXT ·consumed(SB), NOSPLIT, $0-12
	MOVD  record+0(FP), R0
	MOVWU v+8(FP), R1
	DMB   $3 // OSH: loads before the store, too
	MOVW  R1, (R0)
	RET

// func fromDevice()
TEXT ·fromDevice(SB), NOSPLIT, $0-0
	DMB $1 // OSHLD
	RET
