// DRAM behind an AXI4 master: the memory model of whole-network simulations.
//
// In order per direction, INCR bursts of any legal size and length, one beat per cycle. A read's first beat comes
// LATENCY cycles after its address, a write's response LATENCY cycles after its last beat; further bursts follow
// without a gap. Each of the five channels may be stalled at random, with stall_permille / 1000 per cycle. Beats whose
// bytes lie in error_first..error_last are answered with error_response, and are not written.
//
// The host's door is a pair of text files, one hexadecimal bus beat per line: on a rising edge of host_write or
// host_read, beats host_beat .. host_beat+host_count-1 are filled from +host_write_file, or written to
// +host_read_file; host_done rises one clock later.

`default_nettype none

module axi_memory #(
    parameter BUS_BYTES = 8,
    parameter ADDR_BITS = 32,
    parameter ID_BITS = 1,
    parameter MEMORY_BYTES = 1 << 26,
    parameter LATENCY = 20,
    parameter QUEUE = 32
) (
    input wire clk,
    input wire rst,
    input wire [9:0] stall_permille,
    input wire [ADDR_BITS-1:0] error_first,
    input wire [ADDR_BITS-1:0] error_last,
    input wire [1:0] error_response,
    input wire host_write,
    input wire host_read,
    input wire [31:0] host_beat,
    input wire [31:0] host_count,
    output reg host_done,
    input wire [ID_BITS-1:0] arid,
    input wire [ADDR_BITS-1:0] araddr,
    input wire [7:0] arlen,
    input wire [2:0] arsize,
    input wire arvalid,
    output wire arready,
    output reg [ID_BITS-1:0] rid,
    output reg [8*BUS_BYTES-1:0] rdata,
    output reg [1:0] rresp,
    output reg rlast,
    output reg rvalid,
    input wire rready,
    input wire [ID_BITS-1:0] awid,
    input wire [ADDR_BITS-1:0] awaddr,
    input wire [7:0] awlen,
    input wire [2:0] awsize,
    input wire awvalid,
    output wire awready,
    input wire [8*BUS_BYTES-1:0] wdata,
    input wire [BUS_BYTES-1:0] wstrb,
    input wire wlast,
    input wire wvalid,
    output wire wready,
    output reg [ID_BITS-1:0] bid,
    output reg [1:0] bresp,
    output reg bvalid,
    input wire bready,
    // A protocol rule that the master has broken; 0 while there is none.
    output reg [7:0] violation
);
    localparam BEATS = MEMORY_BYTES / BUS_BYTES;
    localparam BEAT_BITS = $clog2(BUS_BYTES);

    reg [8*BUS_BYTES-1:0] memory [0:BEATS-1];
    reg [64*8-1:0] write_file, read_file;
    reg host_write_before, host_read_before;
    reg [31:0] now;

    initial begin
        if (!$value$plusargs("host_write_file=%s", write_file)) write_file = "host_write.hex";
        if (!$value$plusargs("host_read_file=%s", read_file)) read_file = "host_read.hex";
        host_write_before = 0;
        host_read_before = 0;
        host_done = 0;
    end

    always @(posedge clk) begin
        host_write_before <= host_write;
        host_read_before <= host_read;
        host_done <= host_write | host_read;
        if (host_write && !host_write_before) $readmemh(write_file, memory, host_beat, host_beat + host_count - 1);
        if (host_read && !host_read_before) $writememh(read_file, memory, host_beat, host_beat + host_count - 1);
    end

    // One pseudo-random word per cycle; ten bits of it for each channel.
    reg [63:0] noise;
    wire [4:0] stall;
    genvar k;
    generate
        for (k = 0; k < 5; k = k + 1) begin : stalls
            assign stall[k] = noise[12*k +: 10] < stall_permille;
        end
    endgenerate
    always @(posedge clk)
        if (rst) noise <= 64'h9E3779B97F4A7C15;
        else noise <= {noise[62:0], noise[63] ^ noise[62] ^ noise[60] ^ noise[59]} ^ (noise >> 17);

    function in_error(input [ADDR_BITS-1:0] first, input [2:0] size);
        in_error = error_response != 0 && first + ((1 << size) - 1) >= error_first && first <= error_last;
    endfunction

    // Reads -----------------------------------------------------------------------------------------------------
    reg [ADDR_BITS-1:0] ar_addr [0:QUEUE-1];
    reg [7:0] ar_len [0:QUEUE-1];
    reg [2:0] ar_size [0:QUEUE-1];
    reg [ID_BITS-1:0] ar_id [0:QUEUE-1];
    reg [31:0] ar_due [0:QUEUE-1];
    reg [31:0] ar_in, ar_out;
    reg [7:0] r_beat;
    wire [31:0] ar_head = ar_out % QUEUE;
    wire [ADDR_BITS-1:0] r_addr = ar_addr[ar_head] + ({{ADDR_BITS-8{1'b0}}, r_beat} << ar_size[ar_head]);
    wire r_due = ar_in != ar_out && $signed(now - ar_due[ar_head]) >= 0;
    assign arready = ar_in - ar_out < QUEUE && !stall[0];

    // Writes ----------------------------------------------------------------------------------------------------
    reg [ADDR_BITS-1:0] aw_addr [0:QUEUE-1];
    reg [7:0] aw_len [0:QUEUE-1];
    reg [2:0] aw_size [0:QUEUE-1];
    reg [ID_BITS-1:0] aw_id [0:QUEUE-1];
    reg [31:0] b_due [0:QUEUE-1];
    reg [1:0] b_resp [0:QUEUE-1];
    reg [31:0] aw_in, w_out, b_out;
    reg [7:0] w_beat;
    reg w_error;
    wire [31:0] aw_head = w_out % QUEUE;
    wire [31:0] b_head = b_out % QUEUE;
    wire [ADDR_BITS-1:0] w_addr = aw_addr[aw_head] + ({{ADDR_BITS-8{1'b0}}, w_beat} << aw_size[aw_head]);
    wire w_bad = in_error(w_addr, aw_size[aw_head]);
    assign awready = aw_in - b_out < QUEUE && !stall[1];
    assign wready = aw_in != w_out && !stall[2];

    integer i;
    always @(posedge clk) begin
        if (rst) begin
            now <= 0;
            ar_in <= 0; ar_out <= 0; r_beat <= 0; rvalid <= 0;
            aw_in <= 0; w_out <= 0; b_out <= 0; w_beat <= 0; w_error <= 0; bvalid <= 0;
            violation <= 0;
        end else begin
            now <= now + 1;
            if (arvalid && arready) begin
                ar_addr[ar_in % QUEUE] <= araddr;
                ar_len[ar_in % QUEUE] <= arlen;
                ar_size[ar_in % QUEUE] <= arsize;
                ar_id[ar_in % QUEUE] <= arid;
                ar_due[ar_in % QUEUE] <= now + LATENCY - 1;
                ar_in <= ar_in + 1;
                if ((araddr & 4095) + ((arlen + 1) << arsize) > 4096) violation <= 1;
                if (araddr + ((arlen + 1) << arsize) > MEMORY_BYTES) violation <= 2;
            end
            if (rvalid && rready) rvalid <= 0;
            if ((!rvalid || rready) && r_due && !stall[3]) begin
                rvalid <= 1;
                rid <= ar_id[ar_head];
                rdata <= memory[r_addr >> BEAT_BITS];
                rresp <= in_error(r_addr, ar_size[ar_head]) ? error_response : 2'b00;
                rlast <= r_beat == ar_len[ar_head];
                r_beat <= r_beat == ar_len[ar_head] ? 0 : r_beat + 1;
                if (r_beat == ar_len[ar_head]) ar_out <= ar_out + 1;
            end

            if (awvalid && awready) begin
                aw_addr[aw_in % QUEUE] <= awaddr;
                aw_len[aw_in % QUEUE] <= awlen;
                aw_size[aw_in % QUEUE] <= awsize;
                aw_id[aw_in % QUEUE] <= awid;
                aw_in <= aw_in + 1;
                if ((awaddr & 4095) + ((awlen + 1) << awsize) > 4096) violation <= 3;
                if (awaddr + ((awlen + 1) << awsize) > MEMORY_BYTES) violation <= 4;
            end
            if (wvalid && wready) begin
                if (!w_bad)
                    for (i = 0; i < BUS_BYTES; i = i + 1)
                        if (wstrb[i]) memory[w_addr >> BEAT_BITS][8*i +: 8] <= wdata[8*i +: 8];
                if (wlast != (w_beat == aw_len[aw_head])) violation <= 5;
                w_beat <= w_beat == aw_len[aw_head] ? 0 : w_beat + 1;
                w_error <= w_beat == aw_len[aw_head] ? 0 : w_error | w_bad;
                if (w_beat == aw_len[aw_head]) begin
                    b_resp[aw_head] <= w_error | w_bad ? error_response : 2'b00;
                    b_due[aw_head] <= now + LATENCY - 1;
                    w_out <= w_out + 1;
                end
            end
            if (bvalid && bready) bvalid <= 0;
            if ((!bvalid || bready) && b_out != w_out && $signed(now - b_due[b_head]) >= 0 && !stall[4]) begin
                bvalid <= 1;
                bid <= aw_id[b_head];
                bresp <= b_resp[b_head];
                b_out <= b_out + 1;
            end
        end
    end
endmodule

`default_nettype wire
