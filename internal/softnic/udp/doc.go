// Package udp is the software NIC's way to other hosts: RoCEv2 packets through ordinary UDP sockets, unprivileged, many in one
// system call where the system can.
//
// A peer may be another software NIC, Linux' rxe, or an adapter. What all of them need, and an ordinary socket gives: packets
// that are not fragmented, with an IPv4 identification that is known before it is sent, since the invariant CRC covers it. Linux
// gives 0 to what leaves an unconnected socket with path MTU discovery.
package udp
