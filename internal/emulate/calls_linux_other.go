//go:build linux && !amd64

package emulate

var oldCalls map[int]handler
