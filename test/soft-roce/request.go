package main

import (
	"encoding/binary"
	"fmt"
)

// An execRequest asks the machine to start a command.
type execRequest struct {
	argv  []string
	env   []string
	dir   string
	merge bool // stdout and stderr are the same file: one pipe keeps the order of what is written to them
}

// The strings are arbitrary bytes, as Linux has it, so this is no JSON: a byte of flags, then lists of strings, each with
// its length before it.
func (r execRequest) encode() []byte {
	b := []byte{0}
	if r.merge {
		b[0] = 1
	}
	for _, list := range [][]string{r.argv, r.env, {r.dir}} {
		b = binary.AppendUvarint(b, uint64(len(list)))
		for _, s := range list {
			b = binary.AppendUvarint(b, uint64(len(s)))
			b = append(b, s...)
		}
	}
	return b
}

func decodeExecRequest(b []byte) (execRequest, error) {
	if len(b) == 0 || b[0] > 1 {
		return execRequest{}, fmt.Errorf("%w: flags of a command", errBadFrame)
	}
	r := execRequest{merge: b[0] == 1}
	b = b[1:]
	var lists [3][]string
	for i := range lists {
		n, b2, err := takeLength(b)
		if err != nil {
			return execRequest{}, err
		}
		b = b2
		for range n {
			size, b2, err := takeLength(b)
			if err != nil {
				return execRequest{}, err
			}
			lists[i] = append(lists[i], string(b2[:size]))
			b = b2[size:]
		}
	}
	if len(b) > 0 || len(lists[0]) == 0 || len(lists[2]) != 1 {
		return execRequest{}, fmt.Errorf("%w: parts of a command", errBadFrame)
	}
	r.argv, r.env, r.dir = lists[0], lists[1], lists[2][0]
	return r, nil
}

// takeLength reads a count of things that each take at least a byte of what follows.
func takeLength(b []byte) (n int, rest []byte, err error) {
	v, used := binary.Uvarint(b)
	if used <= 0 || v > uint64(len(b)-used) {
		return 0, nil, fmt.Errorf("%w: a length in a command", errBadFrame)
	}
	return int(v), b[used:], nil
}

// An exitStatus is how a command ended.
type exitStatus struct {
	code    uint32 // as a shell has it: 128 + n after signal n, 126 and 127 if it could not be started
	message string // why it could not be started, or why its status is not known; else empty
}

func (s exitStatus) encode() []byte {
	return append(binary.LittleEndian.AppendUint32(nil, s.code), s.message...)
}

func decodeExitStatus(b []byte) (exitStatus, error) {
	if len(b) < 4 {
		return exitStatus{}, fmt.Errorf("%w: exit status", errBadFrame)
	}
	return exitStatus{binary.LittleEndian.Uint32(b), string(b[4:])}, nil
}

// A readyReport is what the machine says of itself once it is set up. It travels as JSON.
type readyReport struct {
	Kernel  string
	Uptime  float64 // seconds since its kernel started
	Devices []string
}
