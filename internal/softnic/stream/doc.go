// Package stream carries the packets of one reliable connection on a TCP connection, where UDP does not pass: nothing is lost, comes
// twice, or out of order, until the stream ends.
//
// A packet is preceded by 4 bytes, little-endian: its length, 12 to 4140 bytes, and 0x5352. It is what stands between the UDP header
// and the invariant CRC of RoCEv2, which is left out: TCP and the links below it have checksums, and addresses that it would cover are
// no part of the stream. Whatever else comes ends the stream.
package stream
