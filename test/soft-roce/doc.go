// Soft-roce runs commands in a virtual machine whose kernel has Soft-RoCE (rxe) and soft iWARP (siw) devices, on a machine
// whose own kernel need not have them and without being root:
//
//	go run github.com/ringside-rdma/ringside/test/soft-roce -- go test ./...
//	go run ./test/soft-roce -- ibv_rc_pingpong -d rxe0 ...
//
// Of go test, only the test binaries run in the machine: the go tool stays on the host and starts them through -exec. All
// other commands run in the machine as a whole, and see the host's files at their own paths; what they write there is lost.
//
// The program has four roles, chosen when it starts: the command on the host; the program of go test -exec, which hands a
// test binary to the command; the machine's process 1; and in the machine, the server that starts commands. Being one
// program, they cannot differ in version (for a machine of another architecture it builds itself once more). It must stay free of package net and os/user: without them it links statically
// whatever CGO_ENABLED says, and can be the machine's /init as it is.
package main
