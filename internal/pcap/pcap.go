// Package pcap writes captures that Wireshark and tshark read: pcapng (draft-ietf-opsawg-pcapng), with IP packets that have no
// link layer. Files writes them to files of a limited size, of which the oldest are written over.
package pcap

import (
	"encoding/binary"
	"io"
	"time"
)

// A Writer writes a capture. It is for one goroutine at a time; each packet is one call of the underlying Write.
type Writer struct {
	w          io.Writer
	buf        []byte
	interfaces int
}

// An Interface is where packets were seen. Either text may be empty.
type Interface struct {
	Name        string // if_name
	Description string // if_description
}

// A Direction is which way a packet went through its interface; the zero value says nothing.
type Direction uint8

// Directions, as epb_flags has them.
const (
	In  Direction = 1
	Out Direction = 2
)

// A Packet is an IP packet that was seen.
type Packet struct {
	Interface int // as AddInterface has numbered it
	Time      time.Time
	Direction Direction
	Data      []byte // the packet, or the start of it
	Length    int    // of the whole packet, bytes; 0: of Data
	Lost      uint64 // packets that the capture has lost on this interface since its last one
	Comment   string // shown with the packet; may be empty; of a long one only the start is kept
}

// Block types, options and the link type (LINKTYPE_RAW: the IP version says which it is).
const (
	blockSection    = 0x0a0d0d0a
	blockInterface  = 1
	blockStatistics = 5
	blockPacket     = 6

	optEnd         = 0
	optComment     = 1
	optUserAppl    = 4 // of a section
	optName        = 2 // of an interface
	optDescription = 3 // of an interface
	optTSResol     = 9 // of an interface
	optFlags       = 2 // of a packet
	optDropCount   = 4 // of a packet
	optReceived    = 4 // of statistics
	optDropped     = 5 // of statistics
	byteOrder      = 0x1a2b3c4d
	linkRaw        = 101
	nanoseconds    = 9 // 10^-9 s
	maxText        = 1 << 12
	unknownLength  = 1<<64 - 1
)

// NewWriter starts a capture; app is the program that makes it.
func NewWriter(w io.Writer, app string) (*Writer, error) {
	p := &Writer{w: w}
	p.begin(blockSection)
	p.u32(byteOrder)
	p.u16(1) // version 1.0
	p.u16(0)
	p.u64(unknownLength)
	p.option(optUserAppl, app)
	p.option(optEnd, "")
	return p, p.end()
}

// AddInterface adds an interface, and returns its number: they are counted from 0.
func (p *Writer) AddInterface(i Interface) (int, error) {
	p.begin(blockInterface)
	p.u16(linkRaw)
	p.u16(0)
	p.u32(0) // no limit on what is kept of packets
	if i.Name != "" {
		p.option(optName, i.Name)
	}
	if i.Description != "" {
		p.option(optDescription, i.Description)
	}
	p.option(optTSResol, string(rune(nanoseconds)))
	p.option(optEnd, "")
	p.interfaces++
	return p.interfaces - 1, p.end()
}

// Packet adds a packet, whose interface has been added.
func (p *Writer) Packet(k *Packet) error {
	p.begin(blockPacket)
	p.u32(uint32(k.Interface))
	p.time(k.Time)
	p.u32(uint32(len(k.Data)))
	p.u32(uint32(max(k.Length, len(k.Data))))
	p.buf = append(p.buf, k.Data...)
	p.pad()
	if k.Comment != "" {
		p.option(optComment, k.Comment)
	}
	if k.Direction != 0 {
		p.u16(optFlags)
		p.u16(4)
		p.u32(uint32(k.Direction))
	}
	if k.Lost != 0 {
		p.u16(optDropCount)
		p.u16(8)
		p.u64(k.Lost)
	}
	if k.Comment != "" || k.Direction != 0 || k.Lost != 0 {
		p.option(optEnd, "")
	}
	return p.end()
}

// Statistics says how many packets came through an interface until t, and how many of those the capture has lost.
func (p *Writer) Statistics(i int, t time.Time, received, lost uint64) error {
	p.begin(blockStatistics)
	p.u32(uint32(i))
	p.time(t)
	p.u16(optReceived)
	p.u16(8)
	p.u64(received)
	p.u16(optDropped)
	p.u16(8)
	p.u64(lost)
	p.option(optEnd, "")
	return p.end()
}

func (p *Writer) u16(v uint16) { p.buf = binary.LittleEndian.AppendUint16(p.buf, v) }
func (p *Writer) u32(v uint32) { p.buf = binary.LittleEndian.AppendUint32(p.buf, v) }
func (p *Writer) u64(v uint64) { p.buf = binary.LittleEndian.AppendUint64(p.buf, v) }

// time is a timestamp: its upper half stands first.
func (p *Writer) time(t time.Time) {
	ns := uint64(t.UnixNano())
	p.u32(uint32(ns >> 32))
	p.u32(uint32(ns))
}

func (p *Writer) pad() {
	for len(p.buf)&3 != 0 {
		p.buf = append(p.buf, 0)
	}
}

func (p *Writer) option(code uint16, value string) {
	value = value[:min(len(value), maxText)]
	p.u16(code)
	p.u16(uint16(len(value)))
	p.buf = append(p.buf, value...)
	p.pad()
}

func (p *Writer) begin(block uint32) {
	p.buf = p.buf[:0]
	p.u32(block)
	p.u32(0)
}

// end writes the block: its length stands at both ends.
func (p *Writer) end() error {
	n := uint32(len(p.buf) + 4)
	binary.LittleEndian.PutUint32(p.buf[4:], n)
	p.u32(n)
	_, err := p.w.Write(p.buf)
	return err
}
